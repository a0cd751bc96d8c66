"""Runs on a Ray cluster: submit them, watch them, render the cluster for Kubernetes."""
