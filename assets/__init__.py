"""The shipped tiny CLIP and the world it was pretrained on."""
