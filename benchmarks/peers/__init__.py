"""The engines the CPU benchmark is held against, each run as a process in its own environment.

``setup.sh`` makes the environments, ``client.Peer`` starts a worker in one and asks it for timings,
the ``serve_*`` modules are those workers. They are named so that none hides the package it serves.
"""
