"""Training in PaddlePaddle, in a process of its own: Paddle's libraries and torch's never meet.

`parent` (with torch) writes a job and reads what the child tells of it; `__main__`, `loop` and `models` are the child
(with Paddle); `messages` is what they say to each other. Within this package `import paddle` means the library.
"""
