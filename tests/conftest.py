"Offline, no windows, two threads at most; what is measured in seconds is printed at the end and never asserted."
import os
import platform

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "agg"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("rulediff", deadline=None, derandomize=bool(os.environ.get("CI")), print_blob=True)
settings.load_profile("rulediff")
RECORDS = []


@pytest.fixture(scope="session")
def record():
    "Call with (what, value) to have it printed beside the machine's name at the end of the run."
    return lambda what, value: RECORDS.append((what, value))


def pytest_terminal_summary(terminalreporter):
    if not RECORDS: return
    terminalreporter.section(f"recorded on {platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}")
    for what, value in RECORDS: terminalreporter.write_line(f"{what}: {value}")
