"""The four feature maps of a LaViT under real heads, on made pictures: small enough to train on a CPU in minutes."""
