"""Triton implementations of the ops, one module an op. Importing one needs Triton."""
