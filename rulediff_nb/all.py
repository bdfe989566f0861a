"Everything a reader types, in one import."
from rulediff_nb.classifier import *
from rulediff_nb.core import *
from rulediff_nb.features import *
from rulediff_nb.filter import *
from rulediff_nb.guide import *
from rulediff_nb.metrics import *
from rulediff_nb.sample import *
from rulediff_nb.schedule import *
from rulediff_nb.store import *
from rulediff_nb.tasks import *
from rulediff_nb.train import *
from rulediff_nb.unet import *
