"""M4: discipline.

TARGET    99.4% in each of the last five epochs: channels re-balanced, ten or more in the middle, no
          1x1 convolution after the pooling.

RESULT    n=5 seeds, last epoch: mean 99.57, min 99.52, best epoch 99.64; lowest of all
          last-five epochs 99.48 (AMD EPYC, bfloat16, one thread, torch 2.15.0). Seeds 6 to 20: mean
          99.56, min 99.42, best epoch 99.68; lowest of all last-five epochs 99.42

ANALYSIS  Parameters moved to where the features are made: with the same budget and the same recipe
          as M3 the accuracy is at least as high, and a run takes less time.
"""

import time

import utils
from models import MNIST_CNN_M4

BATCH_SIZE = 128  # small enough for many steps in 15 epochs, large enough to keep two cores busy
MAX_LR = 0.05  # how far a step goes: Muon makes the singular values of an update about 1, times this
MOMENTUM = 0.95  # 0.9 did as well
WARMUP = 0.2  # three of fifteen epochs to climb, twelve to settle
DROPOUT = 0.02  # a net this small underfits; with 0.05 (and AdamW) the last epochs were 0.05 points lower; none at all did as well
# degrees, degrees, parts of the size and of the side; 6 degrees did as well on the holdout, 10 worse
AUGMENT = {"rotation": 8, "shear": 8, "scale": 0.08, "shift": 0.06}
# pixels, part of the epochs: a border of two pixels holds 0.7% of the ink, and an epoch without it is a quarter cheaper
CROP = (24, 0.4)
AVERAGE_DECAY = 0.998  # spans about one epoch: long enough to smooth, short enough to follow


def main():
    args = utils.parse_args("M4", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.classify(args, MNIST_CNN_M4)
    data = utils.load_data(args)
    config = utils.recipe_config(args, globals())
    histories, summaries = [], []
    for seed in args.seeds:
        # The average of the weights is what is tested and saved.
        model, average = utils.build(MNIST_CNN_M4, args, seed, DROPOUT)
        optimizer = utils.Muon(model, args.max_lr, MOMENTUM)
        scheduler = utils.one_cycle(
            optimizer, args.max_lr, args.epochs, len(data.train_labels), args.batch_size, WARMUP
        )
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
