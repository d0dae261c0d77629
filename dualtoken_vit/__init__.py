"""DualToken-ViT (arXiv 2309.12424). Importing this package registers its models with timm."""

from dualtoken_vit.lightvit import LightViT
from dualtoken_vit.model import DualTokenViT

__version__ = "0.1.0"
__all__ = ["DualTokenViT", "LightViT", "__version__"]
