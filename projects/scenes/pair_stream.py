"""Compose pairs in background processes, in chunks of one shape, into memory that all processes share.

A chunk's pairs are a function of the seed and of the chunk's number, whichever process composes it and whenever.
"""

import mmap
import multiprocessing
import os
import queue
import traceback
from dataclasses import dataclass

import numpy as np
from compose import Bank, compose_pair


# Chunks of these numbers are held out: test photographs, views and models, in the first shape.
NUM_VALIDATION_CHUNKS = 2


@dataclass
class Chunk:
    """Pairs of one shape; the arrays are views of a slot, valid until it is released.

    Args:
        number (`int`): Which chunk of the run this is.
        slot (`int`): Where it lies.
        sources, targets (`np.ndarray`): uint8 of shape `(pairs, height, width, 3)`.
        edit_masks (`np.ndarray`): bool of shape `(pairs, tokens)`: tokens that the edit may change.
        input_ids (`np.ndarray`): int64 of shape `(pairs, num_text_tokens)`, padded with 0.
    """

    number: int
    slot: int
    sources: np.ndarray
    targets: np.ndarray
    edit_masks: np.ndarray
    input_ids: np.ndarray

    @property
    def is_validation(self) -> bool:
        return self.number < NUM_VALIDATION_CHUNKS


def compute_token_mask(mask: np.ndarray, stride: int) -> np.ndarray:
    """Mark the tokens, in raster order, whose square holds a marked pixel of a mask `(height, width)`."""
    height, width = mask.shape
    squares = mask.reshape(height // stride, stride, width // stride, stride)
    return squares.any(axis=(1, 3)).reshape(-1)


class PairStream:
    """Background processes that compose pairs until the stream is closed.

    Start it before CUDA is used: the processes are forks, so that they share the bank.

    Args:
        bank (`Bank`): Objects and photographs.
        processor (`EditARProcessor`): Splits prompts.
        shapes (sequence of `(height, width)`): Shapes in pixels; the first is the square one.
        shares (sequence of `float`): How often each shape is drawn.
        stride (`int`): Pixels per side of a token.
        chunk_size (`int`): Pairs of a chunk.
        num_slots (`int`): Chunks that are kept at most; when all are taken, the processes wait.
        num_workers (`int`): Processes.
        seed (`int`): Another seed, other pairs.
    """

    def __init__(self, bank: Bank, processor, shapes, shares, stride, chunk_size, num_slots, num_workers, seed=0):
        self.bank, self.processor, self.shapes, self.shares = bank, processor, list(shapes), list(shares)
        self.stride, self.chunk_size, self.seed = stride, chunk_size, seed
        most_pixels = max(height * width for height, width in self.shapes)
        self.images = self._share((num_slots, 2, chunk_size * most_pixels * 3), np.uint8)
        self.masks = self._share((num_slots, chunk_size * most_pixels // stride**2), np.bool_)
        self.prompts = self._share((num_slots, chunk_size, processor.num_text_tokens), np.int64)
        context = multiprocessing.get_context("fork")
        self.free, self.ready, self.next_number = context.Queue(), context.Queue(), context.Value("q", 0)
        for slot in range(num_slots):
            self.free.put(slot)
        self.workers = [context.Process(target=self._work, daemon=True) for _ in range(num_workers)]
        for worker in self.workers:
            worker.start()

    @staticmethod
    def _share(shape, dtype) -> np.ndarray:
        # Anonymous memory: /dev/shm is often smaller than what is needed.
        memory = mmap.mmap(-1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype=dtype).reshape(shape)

    def get_shape(self, number: int) -> tuple[int, int]:
        """Return height and width in pixels of a chunk."""
        if number < NUM_VALIDATION_CHUNKS:
            return self.shapes[0]
        draw = np.random.default_rng((self.seed, number)).choice(len(self.shapes), p=self.shares)
        return self.shapes[draw]

    def _work(self):
        os.nice(10)  # training and compilation come first
        parent = os.getppid()
        try:
            while os.getppid() == parent:  # else it was killed
                try:
                    slot = self.free.get(timeout=2)
                except queue.Empty:
                    continue
                with self.next_number.get_lock():
                    number = self.next_number.value
                    self.next_number.value += 1
                self._compose(self._open(slot, number))
                self.ready.put((slot, number))
        except Exception:
            self.ready.put(traceback.format_exc())

    def _compose(self, chunk: Chunk):
        split = "test" if chunk.is_validation else "train"
        height, width = self.get_shape(chunk.number)
        prompts, tasks = [], []
        for place in range(self.chunk_size):
            index = chunk.number * self.chunk_size + place
            pair = compose_pair(self.bank, self.seed, index, split=split, height=height, width=width)
            chunk.sources[place], chunk.targets[place] = pair.source, pair.target
            chunk.edit_masks[place] = compute_token_mask(pair.mask, self.stride)
            prompts.append(pair.instruction)
            tasks.append(pair.task)
        chunk.input_ids[:] = self.processor(text=prompts, task=tasks, return_tensors="np").input_ids

    def _open(self, slot: int, number: int) -> Chunk:
        height, width = self.get_shape(number)
        shape, num_tokens = (self.chunk_size, height, width, 3), height * width // self.stride**2
        sources, targets = (half[: np.prod(shape)].reshape(shape) for half in self.images[slot])
        masks = self.masks[slot, : self.chunk_size * num_tokens].reshape(self.chunk_size, num_tokens)
        return Chunk(number, slot, sources, targets, masks, self.prompts[slot])

    def take(self, timeout: float | None = None) -> Chunk | None:
        """Return a composed chunk, waiting for at most `timeout` seconds; `None` if there is none.

        Raises:
            RuntimeError: If a process failed; with its traceback.
        """
        try:
            message = self.ready.get(timeout=timeout) if timeout else self.ready.get_nowait()
        except queue.Empty:
            return None
        if isinstance(message, str):
            raise RuntimeError(f"Composing pairs failed:\n{message}")
        return self._open(*message)

    def release(self, chunk: Chunk):
        """Give a chunk's memory back; its arrays are overwritten from now on."""
        self.free.put(chunk.slot)

    def close(self):
        """Stop the processes."""
        for worker in self.workers:
            worker.terminate()
        for worker in self.workers:
            worker.join()
