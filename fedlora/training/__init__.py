"""Training and evaluation of several clients' adapters on one base, and the interface of local training."""
