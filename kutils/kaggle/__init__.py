"""To Kaggle and back: packing, client, metadata, mounted inputs, submission file."""
