"""Lightning callbacks."""

from litropy.callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from litropy.callbacks.collapse_detector import CollapseDetector
from litropy.callbacks.compressed_checkpoint_io import CompressedCheckpointIO
from litropy.callbacks.compressed_export import CompressedExport
from litropy.callbacks.curves import Curves
from litropy.callbacks.entropy_change import EntropyChange
from litropy.callbacks.entropy_law_forecast import EntropyLawForecast
from litropy.callbacks.entropy_regularizer import AttentionEntropyRegularizer
from litropy.callbacks.hugging_face_folder import HuggingFaceFolder
from litropy.callbacks.last_checkpoint import LastCheckpoint
from litropy.callbacks.learning_rate_backoff import LearningRateBackoff
from litropy.callbacks.metrics_file import MetricsFile
from litropy.callbacks.output_entropy_monitor import OutputEntropyMonitor
from litropy.callbacks.policy_monitor import PolicyMonitor
from litropy.callbacks.progress_bar import StepProgressBar
from litropy.callbacks.qk_clip import QKClip
from litropy.callbacks.recovery import recovery_actions
from litropy.callbacks.representation_collapse_monitor import RepresentationCollapseMonitor
from litropy.callbacks.reset_moments import ResetMoments
from litropy.callbacks.run_report import RunReport
from litropy.callbacks.sample_table import SampleTable
from litropy.callbacks.sigma_reparam import SigmaReparam
from litropy.callbacks.throughput import Throughput

__all__ = [
    "AttentionEntropyMonitor",
    "AttentionEntropyRegularizer",
    "CollapseDetector",
    "CompressedCheckpointIO",
    "CompressedExport",
    "Curves",
    "EntropyChange",
    "EntropyLawForecast",
    "HuggingFaceFolder",
    "LastCheckpoint",
    "LearningRateBackoff",
    "MetricsFile",
    "OutputEntropyMonitor",
    "PolicyMonitor",
    "QKClip",
    "RepresentationCollapseMonitor",
    "ResetMoments",
    "RunReport",
    "SampleTable",
    "SigmaReparam",
    "StepProgressBar",
    "Throughput",
    "recovery_actions",
]
