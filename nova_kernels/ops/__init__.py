"""The ops: contract, plain-torch reference, operator and gradient of each, one module an op."""
