"""The colours of all charts: Okabe and Ito's eight, which people with colour blindness can tell apart.

Source: M. Okabe and K. Ito, Color Universal Design, 2008.
"""

BLUE = "#0072B2"
VERMILION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
ORANGE = "#E69F00"
SKY = "#56B4E9"
YELLOW = "#F0E442"
BLACK = "#000000"
GREY = "#7F7F7F"
PALE_GREY = "#C8C8C8"
