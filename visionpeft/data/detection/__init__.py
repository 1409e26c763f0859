"""Images with boxes, and masks, of the objects in them: data sets, readers, and the embedded scenes."""
