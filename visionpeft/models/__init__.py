"""Models made ready: backbones with weights, CLIP, clips of video."""
