"""lth-oneshot: pruning before training (GraSP, SNIP, SynFlow, magnitude, random)."""

from lth_tf.tools.experiment import experiment

run = experiment("one_shot")

if __name__ == "__main__":
    run()
