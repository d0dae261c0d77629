"""DualToken-ViT (arXiv 2309.12424). Importing this package registers its models with timm."""

from dualtoken_vit.models.dualtoken import DualTokenViT
from dualtoken_vit.models.lightvit import LightViT

__version__ = "0.1.0"
__all__ = ["DualTokenViT", "LightViT", "__version__"]
