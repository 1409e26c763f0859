"""Images of other libraries' readers: WebDataset shards, Hugging Face data sets, and what timm and torchvision read."""
