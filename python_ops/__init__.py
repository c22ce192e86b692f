"""The models storey, in rooms. A room may import those below it, never one above:

    tools         what a user runs: diagnose and its plot, evaluate, environment, lm-eval
    jobs          compressing a checkpoint or a model: compress, workers, memory, swap, what is remembered of a job
    training      finetune, lora
    methods       one file a published system, and what all share
    calibration   statistics of a model on a text: collect, keep, read
    models        transformers: layouts, layer, routers and routing, checkpoint, the dense model, the quantizer plug-in
    solvers       mathematics on tensors, knowing no model
    storage       files: which of a folder are a model, what they hold, and writing them so that they survive

cli.py, above them all, is the command line. tests/house/test_rooms.py reads the order here.
"""
