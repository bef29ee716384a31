"""Sentences about nobody: what relearning on unrelated text reads."""

UNRELATED = tuple(
    """\
Bread rises because yeast turns sugar into gas, which the dough holds back in small bubbles.
The tide comes in twice a day, pulled by the moon and, more weakly, by the sun.
A bicycle stays upright more easily when it moves, since small turns of the wheel correct its fall.
Snow looks white because its many small surfaces scatter light of every colour alike.
To plant a tree, dig a hole twice as wide as its roots and water it well in the first summer.
Glass is made from sand, soda and lime, melted together and cooled before crystals can form.
Bees tell each other where flowers are by dancing on the comb.
A map is drawn to a scale, so that a length on paper stands for a longer one on the ground.
Soap has one end that likes water and one that likes fat, and so it carries grease away.
Paper was once made from rags; today most of it is made from wood.
The colours of autumn leaves were there all summer, hidden behind the green.
A lever moves a heavy load with little force over a long way.
Tea leaves are picked by hand, withered, rolled and dried before they are packed.
Rivers carry stones downhill, and the further they travel the rounder the stones become.
A violin's sound is made by its body, which the strings set in motion through the bridge.
Concrete hardens because cement binds water, and it needs no air for that.
Birds that fly far in autumn find their way by the sun, the stars and the field of the earth.
A good knife is sharpened often and a little, rather than seldom and a lot.
Clouds form where moist air cools and its water gathers on grains of dust.
Chess is played on a board of sixty-four squares, with sixteen pieces on each side.
Wool keeps one warm even when it is wet, since it holds air between its fibres.
A candle burns the vapour of its wax, not the wax itself.
Salt lowers the point at which water freezes, which is why it is put on roads in winter.
An echo is heard when a wall is far enough away for the sound to come back late.""".splitlines()
)
