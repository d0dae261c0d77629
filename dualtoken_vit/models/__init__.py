"""The networks, and detectors and segmenters over any timm backbone. Importing it registers the networks with timm."""

from dualtoken_vit.models import dualtoken, lightvit  # noqa: F401
