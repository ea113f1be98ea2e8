"""M3: capacity, max-pool position, augmentation, OneCycle.

TARGET    More filters; the max-pool after four convolutions; dropout after each block; images
          varied at random; and a learning rate that rises, then falls.

RESULT    99.49% on average over seeds 1 to 5, lowest 99.45; never below 99.39 in the last five
          epochs.

ANALYSIS  The ladder's largest step: 0.3 points over M2, on the same plain images. Network,
          augmentation and schedule change together.
"""

import torch
from torch.nn import functional as F
from torchsummary import summary

import utils
from models import MNIST_CNN_M3

BATCH_SIZE = 128  # small enough for many steps in 15 epochs; M4 did no better with 64
MAX_LR = 0.02  # the peak of utils.one_cycle; as in M4, not tuned for M3
WARMUP = 0.2  # three of fifteen epochs to climb, twelve to settle
DROPOUT = 0.02  # little: a network this small underfits
AVERAGE_DECAY = 0.998  # spans 1 / (1 - 0.998) = 500 steps, about one epoch
# The limits of utils.augment: small enough that every digit stays readable.
AUGMENT = {"rotation": 8, "shear": 8, "scale": 0.08, "shift": 0.06}


def main():
    args = utils.parse_args("M3", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.read_digits(args, MNIST_CNN_M3)
    summary(MNIST_CNN_M3(), (1, 28, 28), device="cpu")
    data = utils.load_data(args)
    # Recorded in metrics.json; --resume refuses another.
    recipe = {
        "warmup": WARMUP,
        "dropout": DROPOUT,
        "average_decay": AVERAGE_DECAY,
        "augment": AUGMENT,
    }
    runs = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = MNIST_CNN_M3(DROPOUT).to(args.device, memory_format=args.memory_format)
        average = utils.weight_average(model, AVERAGE_DECAY)
        optimizer = torch.optim.AdamW(model.parameters(), args.max_lr, fused=True)
        steps = args.epochs * data.batches_per_epoch
        scheduler = utils.one_cycle(optimizer, args.max_lr, steps, WARMUP)
        # What a checkpoint holds, for --resume.
        parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
        run = utils.Run(args, seed, recipe, parts)
        for epoch in run.epochs():  # those that are left, after --resume
            torch.manual_seed(1000 * seed + epoch)  # so that a resumed run draws the same
            model.train()
            for images, labels in data.batches(epoch):
                images = utils.augment(images, **AUGMENT)
                logits = model(utils.normalize(images))
                loss = F.cross_entropy(logits, labels)
                run.count(loss, logits, labels)  # for the printed figures only
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                scheduler.step()
                average.update_parameters(model)  # what is evaluated and saved
            run.end_epoch(utils.evaluate(average, data))
        run.save()
        runs.append(run)
    return utils.finish(args, data, runs)


if __name__ == "__main__":
    utils.launch(main)
