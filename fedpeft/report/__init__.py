"""What a run's journal says, as tables, plots and one self-contained page.

`tables` needs no plotting library, so a run can end with its table at no cost; `plots` and `page` load matplotlib.
"""
