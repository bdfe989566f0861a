"A slider of `core.explore`, moved in JupyterLab by a real browser: notebook tests never run a widget's callback."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from tree import clean_env

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
CELL = "from rulediff_nb.core import explore\nexplore(lambda scale: f'six times {scale} is {6*scale}', scale=[1, 5, 7])"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or set CHROMIUM")]


def notebook(cell):
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="Python 3", language="python")),
                cells=[dict(cell_type="code", id="a", source=cell, metadata={}, outputs=[], execution_count=None)])


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(url, server, seconds=60):
    "Wait until `url` answers; the server's death ends the wait."
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try: return urllib.request.urlopen(url, timeout=5).status == 200
        except OSError: time.sleep(.3)
    return False


@pytest.fixture
def lab(tmp_path):
    "JupyterLab on a port of its own, with its settings in a temporary folder; gives (url, folder of the notebooks)."
    where = {f"JUPYTER_{k}_DIR": str(tmp_path/k) for k in ("CONFIG", "DATA", "RUNTIME")}
    where |= {"JUPYTERLAB_SETTINGS_DIR": str(tmp_path/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path/"spaces")}
    quiet = tmp_path/"settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    quiet.parent.mkdir(parents=True)
    quiet.write_text('{"fetchNews": "false", "checkForUpdates": false}')
    root, port = tmp_path/"nbs", free_port()
    root.mkdir()
    cmd = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
           "--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--ServerApp.ip=127.0.0.1", "--LabApp.extension_manager=readonly"]
    env = {k: v for k, v in clean_env(**where).items() if k != "MPLBACKEND" and not k.lower().endswith("_proxy")}
    with open(tmp_path/"log", "w") as log:
        server = subprocess.Popen(cmd, env=env, stdout=log, stderr=log)
        try:
            assert answers(f"http://127.0.0.1:{port}/api", server), (tmp_path/"log").read_text()[-3000:]
            yield f"http://127.0.0.1:{port}", root
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill()


def slide(lab, profile, cell, keys):
    "Run the cell, focus its slider, press the keys one by one; the outputs' text before and after each."
    from playwright.sync_api import sync_playwright
    url, root = lab
    (root/"slider.ipynb").write_text(json.dumps(notebook(cell)))
    with sync_playwright() as p:
        browser = p.chromium.launch_persistent_context(str(profile), executable_path=CHROMIUM, args=FLAGS, headless=True)
        try:
            page = browser.new_page()
            page.goto(f"{url}/lab/tree/slider.ipynb?reset", timeout=90_000)
            page.locator(".jp-CodeCell .cm-content").first.click(timeout=90_000)
            page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").first.wait_for(state="attached", timeout=90_000)
            page.keyboard.press("Control+Enter")
            text = page.locator(".jp-OutputArea-output .jp-OutputArea-output pre")
            text.first.wait_for(timeout=90_000)
            seen, handle = [text.first.inner_text()], page.locator(".noUi-handle").first
            for key in keys:
                handle.focus()
                page.keyboard.press(key)
                end = time.monotonic() + 10
                while text.first.inner_text() == seen[-1] and time.monotonic() < end: page.wait_for_timeout(100)
                seen.append(text.first.inner_text())
            return seen
        finally: browser.close()


def test_moving_the_slider_changes_the_output(lab, tmp_path, record):
    start = time.perf_counter()
    seen = slide(lab, tmp_path/"profile", CELL, ["ArrowRight", "ArrowRight", "ArrowLeft"])
    assert seen == [f"'six times {k} is {6*k}'" for k in (1, 5, 7, 5)]
    record("slider moved in JupyterLab", f"{time.perf_counter() - start:.0f} s")
