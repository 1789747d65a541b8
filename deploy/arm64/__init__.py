"""Builds Dockerfile.arm64 on an x86 machine without a Docker daemon, and proves the image under emulation."""
