"""What `gpu.py` measures, in cells that run, fail and are written down one by one."""
