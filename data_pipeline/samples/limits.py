"""How large the members of a sample may be: what is larger is not read, and its sample is bad."""

MIB = 1 << 20
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
OTHER_IMAGES = ("jpe", "jfif", "mpo", "apng", "gif", "bmp", "tif", "tiff", "avif", "heic")
"""What other files of images are called; `pack` stores them under one of IMAGE_EXTENSIONS."""
MOST_BYTES = {**dict.fromkeys(IMAGE_EXTENSIONS, 256 * MIB), "json": 16 * MIB, "txt": 4 * MIB, "cls": MIB}
"""Extension -> bytes; members of other extensions are never read."""
