"""M4: discipline. Look at what M3 misreads, and change what helps.

TARGET    99.4% in each of the last five epochs, on every seed. To get there, M4 rebalances M3's
          channels, keeps ten or more in the middle, has no 1x1 convolution last, and straightens
          the digits: most of those that are misread lean.

RESULT    99.64% on average over seeds 1 to 20, lowest 99.57; never below 99.53 in the last five
          epochs. On plain images: 99.53%, never below 99.43.

ANALYSIS  Each seed stays above the target from epoch 5 on, and on plain images none falls below it
          from epoch 9 on. Network and straightening both help: M3's network ends at 99.51% with
          this recipe, M4's without straightening at 99.53%. M4 is also cheaper than M3: 1.09
          million multiplications an image, not 1.84.
"""

import torch
from torch.nn import functional as F
from torchsummary import summary

import utils
from models import MNIST_CNN_M4

BATCH_SIZE = 128  # small enough for many steps in 15 epochs; 64 did worse, on two seeds
MAX_LR = 0.02  # the peak of utils.one_cycle; 0.03 did as well, on eight seeds
WARMUP = 0.2  # three of fifteen epochs to climb, twelve to settle
DROPOUT = 0.02  # little: a network this small underfits
AVERAGE_DECAY = 0.998  # spans 1 / (1 - 0.998) = 500 steps, about one epoch
STRAIGHTEN = True  # most misread digits lean; see utils.straighten
# The limits of utils.augment: mild, since straightened digits vary less.
AUGMENT = {"rotation": 6, "shear": 4, "scale": 0.06, "shift": 0.04}


def main():
    args = utils.parse_args("M4", __doc__, BATCH_SIZE, MAX_LR)
    if args.predict:
        return utils.read_digits(args, MNIST_CNN_M4)
    summary(MNIST_CNN_M4(), (1, 28, 28), device="cpu")
    data = utils.load_data(args, STRAIGHTEN)
    # Recorded in metrics.json; --resume refuses another.
    recipe = {
        "warmup": WARMUP,
        "dropout": DROPOUT,
        "average_decay": AVERAGE_DECAY,
        "straighten": STRAIGHTEN,
        "augment": AUGMENT,
    }
    runs = []
    for seed in args.seeds:
        torch.manual_seed(seed)
        model = MNIST_CNN_M4(DROPOUT).to(args.device, memory_format=args.memory_format)
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
