"Everything a reader types, in one import; the modules hold the rest."
from rulediff_nb.card import card
from rulediff_nb.classifier import (
    RuleClassifier,
    classifier,
    contrastive,
    fit_classifier,
    fit_pixels,
    load_classifier,
    pixel_classifier,
)
from rulediff_nb.coarse_fine import residual_map, rule_true
from rulediff_nb.core import default_device, explore, from_bytes, progress, row_noise, save_images, show, to_8bit, to_bytes
from rulediff_nb.features import REASONS
from rulediff_nb.filter import best_of, by_classifier, by_ruler, by_verdict, keep
from rulediff_nb.guide import (
    ClassifierGuidance,
    CleanGuidance,
    Guidance,
    GuidedPipeline,
    Oracle,
    RegressorGuidance,
    ShuffledGuidance,
    classifier_free,
    guided,
    interval_scale,
    last_scale,
    rising_scale,
)
from rulediff_nb.images import read_images
from rulediff_nb.metrics import RuleReport, measure, rule_report
from rulediff_nb.sample import ExactDenoiser, as_pipeline, load_pretrained, sample, sample_steps
from rulediff_nb.schedule import add_noise, noise_schedule, snr, solve, target
from rulediff_nb.store import StoreError
from rulediff_nb.study import run_study
from rulediff_nb.table import Study, register_study, results
from rulediff_nb.tasks import TASKS, Perspective, SunShadow, Task, TwoCircles, TwoSquares, check_task, get_task, register
from rulediff_nb.train import fit, train, train_steps
from rulediff_nb.unet import PRESETS, Recipe, RuleUNet, recipe, unet
from rulediff_nb.when import DIAGNOSES, inpaint

__all__ = [name for name in dir() if not name.startswith('_')]
