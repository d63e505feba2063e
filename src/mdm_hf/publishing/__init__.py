"""From a folder to the Hub and to users: model cards, push and pull, the entry of Inference Endpoints."""
