"""What segmentation leaves of a slide: its mask as an OME-TIFF, its objects as GeoJSON and GeoParquet."""
