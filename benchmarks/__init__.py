"""Measurements that the README reports."""
