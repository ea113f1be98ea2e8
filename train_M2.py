"""M2: batch norm, dropout, global average pooling.

TARGET    Fewer parameters than M1 at the same accuracy: batch norm after every convolution but
          the last, two dropout layers, and global average pooling in place of M1's wide last layer.

RESULT    99.19% on average over seeds 1 to 5, lowest 99.14; never below 99.05 in the last five
          epochs.

ANALYSIS  As accurate as M1 with two fifths fewer parameters. With M4's recipe, this network ends at
          99.35%: to do better it needs more than that.
"""

import torch
from torch.nn import functional as F
from torchsummary import summary

import utils
from models import MNIST_CNN_M2

BATCH_SIZE = 128  # small enough for many steps in 15 epochs; M4 did no better with 64
MAX_LR = 0.005  # constant; batch norm allows more than M1's
DROPOUT = 0.02  # little: a network this small underfits
AVERAGE_DECAY = 0.998  # spans 1 / (1 - 0.998) = 500 steps, about one epoch


def main():
    args = utils.parse_args("M2", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.read_digits(args, MNIST_CNN_M2)
    summary(MNIST_CNN_M2(), (1, 28, 28), device="cpu")
    data = utils.load_data(args)
    # Recorded in metrics.json; --resume refuses another.
    recipe = {"dropout": DROPOUT, "average_decay": AVERAGE_DECAY}
    runs = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = MNIST_CNN_M2(DROPOUT).to(args.device, memory_format=args.memory_format)
        average = utils.weight_average(model, AVERAGE_DECAY)
        optimizer = torch.optim.AdamW(model.parameters(), args.max_lr, fused=True)
        # What a checkpoint holds, for --resume.
        parts = {"model": model, "average": average, "optimizer": optimizer}
        run = utils.Run(args, seed, recipe, parts)
        for epoch in run.epochs():  # those that are left, after --resume
            torch.manual_seed(1000 * seed + epoch)  # so that a resumed run draws the same
            model.train()
            for images, labels in data.batches(epoch):
                logits = model(utils.normalize(images))
                loss = F.cross_entropy(logits, labels)
                run.count(loss, logits, labels)  # for the printed figures only
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                average.update_parameters(model)  # what is evaluated and saved
            run.end_epoch(utils.evaluate(average, data))
        run.save()
        runs.append(run)
    return utils.finish(args, data, runs)


if __name__ == "__main__":
    utils.launch(main)
