"""`editar-hf convert-metric-model`: public weight files of LPIPS and FID's Inception to folders."""

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `editar-hf convert-metric-model` to the command's parser."""
    summary = "convert the public weights of LPIPS or FID's Inception to a folder"
    parser = subparsers.add_parser(
        "convert-metric-model",
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}, for `editar-hf evaluate`.",
    )
    networks = parser.add_subparsers(metavar="network", dest="network", required=True)
    lpips = networks.add_parser("lpips", help="LPIPS 0.1 on SqueezeNet 1.1")
    lpips.add_argument("--backbone", metavar="FILE", required=True, help="squeezenet1_1-b8a52dc0.pth")
    lpips.add_argument("--heads", metavar="FILE", required=True, help="squeeze.pth of LPIPS 0.1")
    inception = networks.add_parser("fid-inception", help="the Inception of 2015-12-05")
    inception.add_argument("--weights", metavar="FILE", required=True, help="pt_inception-2015-12-05-6726825d.pth")
    for network in (lpips, inception):
        network.add_argument("--output-dir", metavar="DIR", required=True, help="new folder to write")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Convert one network and write its folder."""
    from pathlib import Path

    from ..conversion import check_output_dir
    from ..evaluation import metric_conversion

    check_output_dir(Path(args.output_dir))
    if args.network == "lpips":
        model = metric_conversion.convert_lpips(args.backbone, args.heads)
    else:
        model = metric_conversion.convert_fid_inception(args.weights)
    metric_conversion.save_metric_model(model, args.output_dir)
    print(f"Wrote {args.output_dir}")
    return 0
