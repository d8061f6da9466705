"""Run the worker: confined first, since torch starts threads when it is imported and they must be confined too."""

from fedsoda_edge.ports.confine import confine

confinement = confine()

from fedsoda_edge.worker.worker import main  # noqa: E402

main(confinement)
