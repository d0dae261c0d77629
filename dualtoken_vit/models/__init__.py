"""The networks, and detectors and segmenters over any timm backbone."""
