"""Data and workers: what moves bytes between storage, Ray and `blt`. Imports `blt`, never `jobs`; assumes that Ray
is running.
"""
