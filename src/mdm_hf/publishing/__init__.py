"""What stands in a repository on the Hub beside the model: the entry of Inference Endpoints."""
