"""M1: set-up, skeleton, lighter model.

TARGET    A sound set-up and a skeleton below 8,000 parameters: 3x3 convolutions, two max-pools,
          1x1 squeezes; no batch norm, no augmentation, a constant learning rate.

RESULT    n=5 seeds, last epoch: mean 99.12, min 99.03, best epoch 99.18; lowest of all
          last-five epochs 98.99 (AMD EPYC, bfloat16, one thread, torch 2.15.0)

ANALYSIS  The last layer is a ReLU: only weights that start out positive (see models.py) keep all
          ten classes alive on every seed. Towards the end the model begins to overfit.
"""

import time

import utils  # isort: skip (first: it answers a Ctrl-C while torch is imported)
import torch

from models import MNIST_CNN_M1

BATCH_SIZE = 128  # small enough for many steps in 15 epochs, large enough to keep two cores busy
MAX_LR = 0.002  # constant; twice as much did as well on one seed, but there is no batch norm to tame it
WEIGHT_DECAY = 0.01
AUGMENT = None  # comes with M3
CROP = None  # the last layer needs the whole image
AVERAGE_DECAY = 0.998  # spans about one epoch: long enough to smooth, short enough to follow


def main():
    args = utils.parse_args("M1", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.classify(args, MNIST_CNN_M1)
    data = utils.load_data(args)
    config = utils.recipe_config(args, globals())
    histories, summaries = [], []
    for seed in args.seeds:
        # The average of the weights is what is tested and saved.
        model, average = utils.build(MNIST_CNN_M1, args, seed)
        optimizer = torch.optim.AdamW(model.parameters(), args.max_lr, weight_decay=WEIGHT_DECAY, fused=True)
        scheduler = None  # OneCycle comes with M3
        parts = {"weights": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
        utils.print_table(model)
        history = utils.resume(args, seed, config, parts)
        for epoch in range(len(history) + 1, args.epochs + 1):
            start = time.perf_counter()
            trained = utils.train(
                model, average, data, optimizer, scheduler, args, epoch, AUGMENT, AVERAGE_DECAY, CROP
            )
            tested = utils.evaluate(average, data.test_images, data.test_labels)[:2]
            seconds = time.perf_counter() - start
            utils.log_epoch(history, optimizer.param_groups[0]["lr"], trained, tested, seconds)
            utils.save_checkpoint(args, seed, config, parts, history)
        histories.append(history)
        summaries.append(utils.save_outputs(args, seed, config, average, history))
    return utils.finish(args, average, summaries, histories, data)


if __name__ == "__main__":
    utils.run(main)
