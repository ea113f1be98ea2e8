"""M1: set-up, skeleton, lighter model.

TARGET    A sound set-up and a skeleton below 8,000 parameters: 3x3 convolutions, two max-pools, 1x1 squeezes; no batch
          norm, no augmentation, a constant learning rate.

RESULT    99.33% on average over seeds 1 to 5, lowest 99.23; never below 99.15 in the last five epochs.

ANALYSIS  M1 ends in a ReLU, so conv7 starts with positive weights (see models.py). Every seed learns all ten classes.
          In the last epoch the weights in training score 0.1 points more on the training images than their average does
          on the test set.
"""

import time

import torch
from torchsummary import summary

import utils
from models import MNIST_CNN_M1

BATCH_SIZE = 128  # small enough for many steps in 15 epochs, large enough to keep two cores busy
MAX_LR = 0.002  # constant; twice as much did as well, on one seed
WEIGHT_DECAY = 0.01
AUGMENT = None  # comes with M3
AVERAGE_DECAY = 0.998  # spans about one epoch: long enough to smooth, short enough to follow


def main():
    args = utils.parse_args("M1", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.read_digits(args, MNIST_CNN_M1)
    data = utils.load_data(args)  # straightens the images, test images too
    summary(MNIST_CNN_M1(), (1, 28, 28), device="cpu")
    records = []
    for seed in args.seeds:
        model = utils.build(MNIST_CNN_M1, seed, args.device)
        average = utils.weight_average(model, AVERAGE_DECAY)
        optimizer = torch.optim.AdamW(model.parameters(), args.max_lr, weight_decay=WEIGHT_DECAY)
        scheduler = None  # OneCycle comes with M3
        parts = {"model": model, "average": average, "optimizer": optimizer}
        record = utils.begin(args, seed, globals(), parts)
        for epoch in range(len(record["history"]) + 1, args.epochs + 1):
            start = time.perf_counter()
            trained = utils.train(
                model, average, data, optimizer, scheduler, args.batch_size, AUGMENT, 0, args.precision, epoch
            )
            tested = utils.evaluate(average, data.test_images, data.test_labels)
            seconds = time.perf_counter() - start
            utils.end_epoch(args, record, parts, trained, tested, seconds)
        utils.save_outputs(args, record, average)
        records.append(record)
    return utils.finish(args, average, data, records)


if __name__ == "__main__":
    utils.run(main)
