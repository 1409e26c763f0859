"""Images with a class for each pixel: masks, data sets, and the embedded scenes."""
