"""The models inside the package: their names, and which of them is taken where none is named."""

SHIPPED: dict[str, str] = {
    "gad-nyuv2": "weights/gad-nyuv2.safetensors",
    "joint-nyuv2": "weights/joint-nyuv2.safetensors",
    "gad-joint-nyuv2": "weights/gad-joint-nyuv2.safetensors",
    "imenet-rooms": "weights/imenet-rooms.safetensors",
    "sscnet-rooms": "weights/sscnet-rooms.safetensors",
    "lrn-camvid": "weights/lrn-camvid.safetensors",
}
DEFAULT = "gad-joint-nyuv2"  # the best labels
START = "gad-nyuv2"  # for finetuning: one network, which can learn
GUIDE = "gad-nyuv2"  # for networks guided by labels and region support: the best depth
COMPLETION = "sscnet-rooms"
