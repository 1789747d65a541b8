"""The part of a run with torch in the process: head, gradient steps, checkpoints, result."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wasi_edge.artefact import read_config
from wasi_edge.atomic import write_json_atomic
from wasi_edge.chunks import EVALUATION_BATCH
from wasi_edge.data.augment import class_weights
from wasi_edge.data.cache import PhotoCache
from wasi_edge.errors import Interrupted, NoUsableData, WasiEdgeError
from wasi_edge.export.photos import Photo, write_run_photos
from wasi_edge.memory.libraries import release_library_pages
from wasi_edge.memory.malloc import release_free_memory, reuse_freed_memory, tune_malloc
from wasi_edge.memory.process import MemoryWatch
from wasi_edge.method import Method
from wasi_edge.training import defaults, first_head, result, setup
from wasi_edge.training.checkpoint import Checkpoint, drop_checkpoints, latest_checkpoint, save_checkpoint
from wasi_edge.training.cooling import Cooler
from wasi_edge.training.first_head import Curve, fit_with_curve
from wasi_edge.training.frozen import TokenFile, cache_tokens, count_passes, identity_of
from wasi_edge.training.guard import MemoryGuard
from wasi_edge.training.head import FeatureStatistics, Head
from wasi_edge.training.loop import Hooks, LoopSettings, Progress, note_epoch, train, validate
from wasi_edge.training.onnx_result import Sample
from wasi_edge.training.photos import PhotoSet, split_photos
from wasi_edge.training.prepare import Prepared, with_ranks
from wasi_edge.training.report_keys import base_report
from wasi_edge.training.request import Events
from wasi_edge.training.signals import StopSignals
from wasi_edge.training.trainer import Trainer

# of which the exported model is asked too
_SAMPLE_PHOTOS = 4


class Session:
    """One run from decoded photos to the result; `sample` is what its network answers, once it has finished."""

    def __init__(
        self,
        prepared: Prepared,
        cache: PhotoCache,
        work_folder: Path,
        events: Events,
        signals: StopSignals,
        watch: MemoryWatch,
        began: float,
    ) -> None:
        torch.set_num_threads(prepared.threads)
        torch.set_grad_enabled(False)
        release_library_pages()
        self._prepared, self._cache, self._work_folder = prepared, cache, work_folder
        self._events, self._signals, self._watch, self._began = events, signals, watch, began
        self._out = prepared.request.out
        self._width = prepared.model.geometry.feature_width
        self._model_folder = prepared.model.folder
        self._tokens: list[TokenFile] = []
        _, hashes = self._earlier_statistics()
        train_indices, val_indices = split_photos(prepared, cache, hashes)
        if not train_indices:
            raise NoUsableData(f"{prepared.request.photos}: no photos are left to train on; add some")
        self._photos = self._photo_set(train_indices, weighted=True)
        self._held_out = self._photo_set(val_indices, weighted=False)
        self._head_accuracy: float | None = None
        self._learning_curve: Curve = []
        self._head_sufficed = False
        self._before: dict[str, Any] | None = None
        self._saved_at: float | None = None
        self._unsaved = False
        self.sample: Sample | None = None
        self._resumed_from: int | None = None
        self._config = setup.artefact_config(prepared, self._training_record())

    def run(self) -> dict[str, Any]:
        """Everything; returns the report, which is on disk by then."""
        self._convert_if_needed()
        if self._prepared.plan.cached_views:
            self._cache_frozen_blocks()
        trainer = setup.build_trainer(self._prepared, self._model_folder, self._active_classes())
        progress = Progress()
        checkpoint = latest_checkpoint(self._work_folder) if self._prepared.request.resume else None
        if checkpoint is not None:
            progress = self._restore(trainer, checkpoint)
        else:
            drop_checkpoints(self._work_folder)
            self._start(trainer, progress)
        if self._prepared.request.method is Method.HEAD:
            status = "completed"
        elif self._head_sufficed:
            self._events.message("the frozen head makes next to no mistakes: there is nothing to train for")
            status = "early_stopped"
        else:
            status = self._train(trainer, progress)
        if status == "interrupted":
            self._checkpoint(trainer, progress)
            report = self._report(status, progress)
            write_json_atomic(self._out / "report.json", report)
            self._events.message(f"stopped by {self._signals.received} and saved; go on with --resume")
            return report
        return self._finish(trainer, progress, status)

    def _train(self, trainer: Trainer, progress: Progress) -> str:
        request, plan, work = self._prepared.request, self._prepared.plan, self._prepared.work
        cooler = Cooler(request.max_temperature, self._events)
        settings = LoopSettings(
            epochs=work.epochs,
            batch=work.batch,
            micro_batch=plan.micro_batch,
            seed=request.seed,
            patience=defaults.PATIENCE,
            max_seconds=request.max_seconds,
            warm_up=defaults.WARM_UP[request.method],
            closing_photos=result.count_statistics_photos(len(self._prepared.labels)),
        )

        guard = MemoryGuard(request.budget_bytes, plan.peak_bytes, plan.micro_batch, self._events)
        settled = False

        def after_step(now: Progress) -> None:
            nonlocal settled
            if not settled:
                settled = True
                self._settle()
            elif now.epoch_step == 0:
                release_library_pages()  # what validating and saving touched
            guard.check(now, trainer)
            cooler.rest(lambda: self._signals.received is not None)
            due = self._saved_at is None or time.monotonic() - self._saved_at >= request.checkpoint_seconds
            if due:
                self._checkpoint_if_possible(trainer, now)

        hooks = Hooks(
            elapsed=self._elapsed,
            stop_wanted=lambda: self._signals.received is not None,
            on_best=lambda: self._save_model(trainer),
            on_gradients=guard.observe,
            on_step=after_step,
            peak_bytes=lambda: self._watch.peak_rss_bytes,
        )
        status = train(trainer, self._photos, self._held_out, settings, progress, self._events, hooks)
        if status == "time_limit":
            self._checkpoint(trainer, progress)
        return status

    def _settle(self) -> None:
        """After the first step: everything that stays has been made, what the head alone needed is over."""
        plan = self._prepared.plan
        if plan.reused_heap:
            reuse_freed_memory(any_size=not (self._prepared.request.method.is_explicit and plan.trimmed))
        release_library_pages()

    def _start(self, trainer: Trainer, progress: Progress) -> None:
        """The closed-form head on the frozen network: epoch 0."""
        if self._prepared.model.is_run:
            self._before = self._accuracy_before(trainer)
        self._events.stage("looking at the photos", len(self._photos))
        features = result.features_of(trainer, self._photos, range(len(self._photos)), self._advance)
        labels, num_classes = self._photos.labels, len(self._prepared.labels)
        earlier = (lambda: self._earlier_statistics()[0]) if self._prepared.model.is_run else None
        head, self._learning_curve = fit_with_curve(features, labels, num_classes, earlier)
        del features
        trainer.set_head(head)
        validation = validate(trainer, self._held_out, self._events)
        self._head_accuracy = validation.accuracy
        # whoever gives the number of epochs gets them
        enough = first_head.suffices(validation.logits, self._held_out.labels, self._learning_curve)
        self._head_sufficed = enough and self._prepared.request.epochs is None
        progress.best_accuracy = -1.0 if validation.accuracy is None else validation.accuracy
        progress.best_loss = math.inf if validation.loss is None else validation.loss
        entry = note_epoch(progress, 0, validation, self._elapsed(), self._watch.peak_rss_bytes)
        self._save_model(trainer)
        self._events.epoch(entry)

    def _finish(self, trainer: Trainer, progress: Progress, status: str) -> dict[str, Any]:
        """The best model again, its held-out photos, the statistics for a later run, the reports."""
        trainer.end_training()
        tune_malloc()
        setup.load_parameters(trainer, self._out)
        validation = validate(trainer, self._held_out, self._events, "looking at the result")
        held_out, photos = result.held_out_results(validation, self._held_out, self._prepared.labels)
        earlier, _ = self._earlier_statistics()
        result.save_statistics(trainer, self._photos, len(self._prepared.labels), earlier, self._out)
        report = {**self._report(status, progress), **held_out}
        if self._prepared.model.is_run:
            model = self._prepared.model
            assert model.config is not None
            classes = self._prepared.labels, len(model.config.labels)
            now = result.old_and_new(*classes, validation, self._held_out)
            report["continued_from"] = {"model": str(model.folder), **now, **(self._before or {})}
        result.write_reports(report, photos, self._out)
        self.sample = self._sample(trainer)
        write_run_photos(
            self._out, self._prepared.request.photos, *map(self._photos_of, (self._photos, self._held_out))
        )
        if status != "time_limit":
            drop_checkpoints(self._work_folder)
            self._remove_inputs()
        return report

    def _sample(self, trainer: Trainer) -> Sample:
        """A few photos and what the network answers to them."""
        photos = self._held_out if len(self._held_out) else self._photos
        chosen = range(min(_SAMPLE_PHOTOS, photos.batch, len(photos)))
        plan = self._prepared.plan
        rounded = bool(plan.cached_views) or plan.weight_bits == 16
        return Sample(photos.views(chosen), None if rounded else trainer.logits(photos.inputs(chosen)).numpy().copy())

    def _photos_of(self, photos: PhotoSet) -> list[Photo]:
        paths, labels = self._cache.paths, self._cache.labels
        return [Photo(paths[int(i)], labels[int(i)]) for i in photos.indices]

    def _report(self, status: str, progress: Progress) -> dict[str, Any]:
        history = progress.history
        seen = progress.photos_seen(len(self._photos), self._prepared.work.batch)
        epochs_run = history[-1]["epoch"] if history else 0
        return {
            **base_report(self._prepared, status, self._watch),
            "optimizer_steps": progress.step,
            "resumed_from_step": self._resumed_from,
            "num_train_images": len(self._photos),
            "num_val_images": len(self._held_out),
            "skipped_files": [
                {"path": skipped.path, "reason": skipped.reason}
                for skipped in [*self._prepared.folder.skipped, *self._cache.skipped]
            ],
            "epochs_run": epochs_run,
            "train_seconds": round(progress.train_seconds, 2),
            "total_seconds": round(self._elapsed(), 2),
            "images_per_second": round(seen / progress.train_seconds, 2) if progress.train_seconds else None,
            "head_only_val_accuracy": self._head_accuracy,
            "head_sufficed": self._head_sufficed,
            "learning_curve": self._learning_curve,
            "best_val_accuracy": None if progress.best_accuracy < 0 else progress.best_accuracy,
            "best_epoch": progress.best_epoch,
            "final_val_accuracy": history[-1]["val_accuracy"] if history else None,
            "history": history,
            "degraded": progress.degraded,
            "memory_samples": [[round(seconds, 2), count] for seconds, count in self._watch.samples],
            "out": str(self._out),
        }

    def _checkpoint(self, trainer: Trainer, progress: Progress) -> None:
        save_checkpoint(
            self._work_folder,
            progress.step,
            trainer.state(),
            {
                "progress": progress.to_dict(),
                "head_accuracy": self._head_accuracy,
                "learning_curve": self._learning_curve,
                "head_sufficed": self._head_sufficed,
                "before": self._before,
            },
        )
        self._saved_at = time.monotonic()

    def _checkpoint_if_possible(self, trainer: Trainer, progress: Progress) -> None:
        """A checkpoint in passing: hours of training do not end because the disk is full for a minute."""
        try:
            self._checkpoint(trainer, progress)
            self._unsaved = False
        except (WasiEdgeError, OSError) as error:
            self._saved_at = time.monotonic()
            if not self._unsaved:
                self._events.message(f"no checkpoint could be saved: {error}; training goes on and tries again")
            self._unsaved = True

    def _restore(self, trainer: Trainer, checkpoint: Checkpoint) -> Progress:
        trainer.load_state(checkpoint.tensors())
        self._head_accuracy = checkpoint.progress["head_accuracy"]
        self._learning_curve = checkpoint.progress.get("learning_curve", [])
        self._head_sufficed = checkpoint.progress.get("head_sufficed", False)
        self._before = checkpoint.progress["before"]
        self._resumed_from = checkpoint.step
        self._saved_at = time.monotonic()
        self._events.message(f"going on from step {checkpoint.step}")
        return Progress.from_dict(checkpoint.progress["progress"])

    def _convert_if_needed(self) -> None:
        """The artefact to train: the model's own folder, or the one it is converted to here."""
        if self._prepared.model.convert_epsilon is None:
            return
        self._model_folder = self._work_folder / "model"
        if not (self._model_folder / "config.json").exists():
            setup.convert_for(self._prepared, self._photos, self._model_folder, self._events)
        self._prepared = with_ranks(self._prepared, read_config(self._model_folder).linears)
        self._config = setup.artefact_config(self._prepared, self._training_record())

    def _cache_frozen_blocks(self) -> None:
        """From here on the photos are what the frozen blocks make of them."""
        views = self._prepared.plan.cached_views
        total = count_passes(len(self._photos), len(self._held_out), views)
        self._events.stage("running the frozen blocks", total)
        request, plan, model = self._prepared.request, self._prepared.plan, self._prepared.model
        size = model.preprocessing.image_size
        last = model.geometry.block_shapes(size)[-plan.trained_blocks - 1]  # of the frozen ones
        sides = (self._photos, self._held_out)
        frozen_photos = cache_tokens(
            self._work_folder / "frozen",
            lambda: setup.build_frozen(self._prepared, self._model_folder),
            (last.tokens, last.width),
            *sides,
            views,
            request.seed,
            identity_of(sides, self._model_folder, request.seed, size, views, plan.trained_blocks, plan.weight_bits),
            self._advance,
            # half of the time is for training
            lambda: request.max_seconds is not None and self._elapsed() > request.max_seconds / 2,
        )
        self._photos, self._held_out = frozen_photos
        self._tokens = [photos.tokens for photos in frozen_photos]
        release_free_memory()

    def _advance(self, done: int) -> None:
        """Progress of what comes before the first step."""
        if self._signals.received:
            raise Interrupted("stopped before the first step; --resume begins there again")
        self._events.advance(done)

    def _earlier_statistics(self) -> tuple[FeatureStatistics | None, set[int]]:
        """Those of the run that this one goes on from, and the hashes of its photos. Read when they are needed: they
        are as large as the head's own fit."""
        model, labels = self._prepared.model, self._prepared.labels
        if not model.is_run:
            return None, set()
        return result.load_statistics(model.folder, len(labels), self._width)

    def _save_model(self, trainer: Trainer) -> None:
        setup.save_model(trainer, self._prepared, self._model_folder, self._config, self._out)

    def _accuracy_before(self, trainer: Trainer) -> dict[str, Any]:
        """How the earlier run's own head does on today's held-out photos of its classes."""
        config = self._prepared.model.config
        assert config is not None
        weight, bias = setup.earlier_head(config, self._prepared.model.folder)
        missing = len(self._prepared.labels) - len(bias)
        padded = Head(
            torch.cat((weight, torch.zeros(missing, weight.shape[1]))),
            torch.cat((bias, torch.full((missing,), -1e4))),  # a class it does not know is never its answer
        )
        trainer.set_head(padded)
        validation = validate(trainer, self._held_out, self._events, "the earlier model on these photos")
        old = set(range(len(bias)))
        return {"old_class_accuracy_before": result.accuracy_on(validation, self._held_out, old)}

    def _photo_set(self, indices: list[int], weighted: bool) -> PhotoSet:
        number = {label: index for index, label in enumerate(self._prepared.labels)}
        labels = [number[self._cache.labels[i]] for i in indices]
        weight = torch.ones(len(labels))
        if weighted and labels:
            per_class = class_weights(labels, len(self._prepared.labels))
            weight = torch.tensor([per_class[label] for label in labels], dtype=torch.float32)
        return PhotoSet(
            self._cache,
            np.array(indices, dtype=np.int64),
            torch.tensor(labels, dtype=torch.int64),
            weight,
            self._prepared.model.preprocessing,
            min(self._prepared.plan.micro_batch, EVALUATION_BATCH),
        )

    def _active_classes(self) -> Tensor | None:
        """Mask of the classes that have photos to train on; None when all do."""
        active = torch.bincount(self._photos.labels, minlength=len(self._prepared.labels)) > 0
        return None if bool(active.all()) else active

    def _training_record(self) -> dict[str, Any]:
        """What config.json says about this run."""
        request, plan = self._prepared.request, self._prepared.plan
        return {
            "method": str(request.method),
            "seed": request.seed,
            "epochs": plan.epochs,
            "effective_batch": self._prepared.work.batch,
            "gradient_rank": plan.gradient_rank,
            "num_train_images": len(self._photos),
        }

    def _remove_inputs(self) -> None:
        """The decoded photos and the converted start: a finished run needs neither."""
        self._cache.close()
        for tokens in self._tokens:
            tokens.close()
        for name in ("photos", "model", "frozen"):
            shutil.rmtree(self._work_folder / name, ignore_errors=True)

    def _elapsed(self) -> float:
        return time.monotonic() - self._began
