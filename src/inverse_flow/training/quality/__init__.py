"""How good samples are, by features of the images and without a download. See docs/quality.md."""

from inverse_flow.training.quality.measure import Judge, Quality, measure_quality, quality_of
from inverse_flow.training.quality.value import Value

__all__ = ["Judge", "Quality", "Value", "measure_quality", "quality_of"]
