"""Lightning callbacks."""

from litropy.callbacks.attention_entropy_monitor import AttentionEntropyMonitor
from litropy.callbacks.collapse_detector import CollapseDetector
from litropy.callbacks.curves import Curves
from litropy.callbacks.hugging_face_folder import HuggingFaceFolder
from litropy.callbacks.last_checkpoint import LastCheckpoint
from litropy.callbacks.metrics_file import MetricsFile
from litropy.callbacks.output_entropy_monitor import OutputEntropyMonitor
from litropy.callbacks.progress_bar import StepProgressBar
from litropy.callbacks.representation_collapse_monitor import RepresentationCollapseMonitor
from litropy.callbacks.run_report import RunReport
from litropy.callbacks.sigma_reparam import SigmaReparam
from litropy.callbacks.throughput import Throughput

__all__ = [
    "AttentionEntropyMonitor",
    "CollapseDetector",
    "Curves",
    "HuggingFaceFolder",
    "LastCheckpoint",
    "MetricsFile",
    "OutputEntropyMonitor",
    "RepresentationCollapseMonitor",
    "RunReport",
    "SigmaReparam",
    "StepProgressBar",
    "Throughput",
]
