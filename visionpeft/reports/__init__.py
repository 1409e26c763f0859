"""What a run shows and costs: progress, history of epochs, tables, figures, time and memory."""
