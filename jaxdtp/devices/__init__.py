"""Devices and hosts: meshes of them, what is divided among them, and how hosts agree."""
