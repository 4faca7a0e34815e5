"""A segmentation head on the four feature maps of a LaViT, on synthetic images: trains on a CPU in minutes."""
