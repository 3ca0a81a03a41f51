"""apacs_ray: the APACS23 cell-segmentation method (Scientific Data 11:733, 2024) as a Ray pipeline."""

__version__ = "0.1.0"
