"""Ray workers, pretended: jobs are done as in a worker, one after the other in this process."""

from __future__ import annotations

import pickle

from rankopt.candidates.pool import pack
from rankopt.search.ray.away import Resources, Update, Workplace, _Running
from rankopt.search.ray.worker import Limits


class PretendedCrew:
    """A crew of some workers, of whose jobs those end first that `which` says: 0 the oldest, -1 the newest.

    It stands for a RaySearch where nothing but whole searches goes to it.
    """

    def __init__(self, workers, which=0, gpus=0.0):
        self.workers, self.which, self.limits, self.gpus = workers, which, Limits(), gpus
        self.done, self.most = [], 0

    def do(self, next_job, stop=lambda: False):
        running = []
        while True:
            while len(running) < self.workers and not stop() and (job := next_job()) is not None:
                running.append(job)
                yield job, Update("waiting for a worker")
            if not running:
                return
            self.most = max(self.most, len(running))
            job = running.pop(self.which)
            self.done.append(job.name)
            yield job, Update(ended=True, stopped=True) if stop() else self._do(job)

    def _do(self, job):
        files = {name: (job.folder / name).read_bytes() for name in job.files}
        parcel = pickle.loads(pickle.dumps(pack(job.shared, other_machines=False)))
        place = Workplace(parcel, job, files, Resources(1, self.gpus, 1))
        update = place.poll(600)
        place.close()
        _Running(job, None, set(job.files)).take(update)
        return update
