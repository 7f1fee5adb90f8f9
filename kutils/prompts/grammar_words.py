"""Holds the words and patterns of `kutils.prompts.grammar`: a context-free grammar, as data.

WORDS holds lists, the more usual words first (they are drawn more often). PATTERNS holds what is put together: each
option with its weight. In an option, `{name}` is a word or pattern, `{name:s}` its plural, and `@` the article a or an.
"""

WORDS = {
    "animal": """cat, dog, horse, bird, fox, owl, tiger, lion, wolf, bear, elephant, rabbit, frog, penguin, octopus,
        whale, monkey, panda, giraffe, zebra, raccoon, french bulldog, corgi, squirrel, hedgehog, otter, sloth, koala,
        kangaroo, crow, raven, parrot, flamingo, peacock, eagle, swan, duck, rooster, chicken, pig, sheep, goat, cow,
        donkey, llama, camel, moose, deer, bison, rhinoceros, hippopotamus, crocodile, iguana, chameleon, gecko,
        frill-necked lizard, sea turtle, tortoise, cobra, python, salamander, axolotl, toad, shark, dolphin, walrus,
        seal, narwhal, manta ray, seahorse, jellyfish, lobster, crab, squid, snail, butterfly, moth, bumblebee,
        dragonfly, beetle, spider, scorpion, grasshopper, praying mantis, ant, firefly, bat, rat, mouse, hamster,
        guinea pig, ferret, skunk, badger, beaver, porcupine, armadillo, anteater, platypus, wombat, lemur, gorilla,
        orangutan, baboon, yak, reindeer, gazelle, hyena, jackal, lynx, leopard, cheetah, panther, snow leopard,
        poodle, greyhound, dalmatian, siamese cat, sphynx cat, ostrich, emu, toucan, hummingbird, kingfisher, pelican,
        heron, vulture, falcon, woodpecker, sparrow, pigeon, turkey, goose, stork, puffin, albatross, pufferfish,
        goldfish, koi fish, clownfish, piranha, eel, starfish, hermit crab, capybara, meerkat, tapir, okapi, mongoose,
        red panda, tasmanian devil""",
    "dinosaur": """tyrannosaurus, triceratops, stegosaurus, velociraptor, ultrasaurus, cheneosaurus, brachiosaurus,
        ankylosaurus, pterodactyl, spinosaurus, diplodocus, parasaurolophus, iguanodon, plesiosaurus, woolly mammoth,
        saber-toothed tiger, dodo, archaeopteryx""",
    "creature": """dragon, robot, alien, unicorn, ghost, mermaid, vampire, zombie, goblin, fairy, golem, phoenix,
        werewolf, centaur, minotaur, griffin, demon, angel, cyborg, gargoyle, kraken, sphinx, cyclops, troll, gnome,
        imp, banshee, sea serpent, yeti, leprechaun, genie, skeleton, android, stone giant, forest spirit, swamp
        monster, robot crane, clockwork owl, three-headed hound, lich, satyr, basilisk, hydra, pegasus, living
        scarecrow, tentacled horror""",
    "person": """astronaut, woman, man, girl, boy, old man, knight, wizard, queen, king, samurai, witch, pirate,
        scientist, soldier, dancer, chef, clown, detective, cowboy, monk, nun, nurse, surgeon, farmer, fisherman,
        sailor, blacksmith, carpenter, baker, butcher, tailor, violinist, pianist, drummer, opera singer, ballerina,
        boxer, sumo wrestler, surfer, skateboarder, cyclist, mountaineer, diver, pilot, racing driver, taxi driver,
        bus conductor, librarian, teacher, professor, student, software engineer, beekeeper, gardener, lumberjack,
        miner, firefighter, policeman, judge, lawyer, banker, emperor, princess, viking, gladiator, greek hero, roman
        senator, pharaoh, geisha, ninja, shaman, druid, alchemist, necromancer, bard, archer, fortune teller,
        magician, acrobat, tightrope walker, beggar, plague doctor, gravedigger, lighthouse keeper, shepherd, hunter,
        explorer, archaeologist, astronomer, painter, sculptor, photographer, journalist, spy, hacker, punk, hippie,
        grandmother, toddler, bride, groom, cheerleader, referee, goalkeeper, tennis player, chess grandmaster,
        barista, waiter, plumber, window cleaner, mail carrier, zookeeper, dentist, tattoo artist, weightlifter,
        fencer, politician, tourist, hermit, mime""",
    "thing": """chair, lamp, book, clock, guitar, violin, piano, umbrella, teapot, mirror, candle, sword, crown, mask,
        globe, telescope, camera, typewriter, radio, television, computer, telephone, vase, statue, fountain, bench,
        ladder, bathtub, sofa, bookshelf, chandelier, rocking chair, grandfather clock, sewing machine, chess set,
        treasure chest, skull, hourglass, compass, lantern, anchor, bell, drum, trumpet, saxophone, harp, accordion,
        ukulele, microphone, gramophone, kite, balloon, teddy bear, doll, puppet, toy train, rubber duck, snow globe,
        music box, jigsaw puzzle, backpack, suitcase, handbag, top hat, sneaker, boot, ring, necklace, wristwatch,
        pair of glasses, suit of armor, helmet, shield, axe, bow, cannon, catapult, microscope, satellite, washing
        machine, refrigerator, toaster, kettle, frying pan, coffee mug, wine glass, fishing rod, surfboard,
        skateboard, football, bowling ball, trophy, mailbox, traffic light, fire hydrant, vending machine, phone
        booth, street lamp, gravestone, crystal ball, potion bottle, spinning wheel, loom, anvil, wheelbarrow,
        beehive, birdcage, aquarium, weather vane, sundial, totem pole""",
    "vehicle": """car, bicycle, motorcycle, train, airplane, boat, ship, bus, truck, tractor, rocket, helicopter,
        submarine, hot air balloon, sailing ship, canoe, tank, fire engine, ambulance, taxi, scooter, tram, steam
        locomotive, spaceship, flying saucer, zeppelin, hovercraft, carriage, sled, snowmobile, excavator, food truck,
        camper van, racing car, double-decker bus, fighter jet, cable car, rickshaw, gondola, pirate ship, moon rover,
        unicycle""",
    "food": """pizza, burger, cake, sandwich, taco, donut, pancake, croissant, burrito, hot dog, pie, pretzel, bagel,
        muffin, cupcake, waffle, black bean taco, sushi roll, dumpling, banana, apple, pineapple, watermelon,
        strawberry, lemon, avocado, pumpkin, carrot, tomato, mushroom, onion, eggplant, artichoke, coconut,
        pomegranate, dragon fruit, ice cream cone, lollipop, candy cane, gingerbread man, fortune cookie, wheel of
        cheese, roast turkey, fried egg, baguette, quesadilla, omelette, meatball, pickle, cinnamon roll, cheesecake,
        macaron, corn cob, boiled egg""",
    "dish": """ramen, spaghetti, fried rice, chocolate, honey, popcorn, cereal, tomato soup, curry, lasagna,
        guacamole, salad, paella, oatmeal, pad thai, poutine, macaroni and cheese, couscous, gazpacho, risotto,
        hummus, kimchi, tofu""",
    "plant": """tree, rose, cactus, sunflower, orchid, tulip, bonsai tree, oak tree, palm tree, willow, fern, lotus
        flower, lily, dandelion, cherry tree, pine tree, poppy, bamboo stalk, baobab, venus flytrap, ivy-covered
        stump, thistle""",
    "building": """house, castle, church, temple, tower, lighthouse, cabin, skyscraper, windmill, bridge, barn,
        palace, cathedral, mosque, pagoda, pyramid, treehouse, cottage, library, hotel, hospital, prison, factory,
        train station, airport, stadium, theater, museum, gas station, diner, bakery, greenhouse, observatory,
        monastery, fortress, igloo, log cabin, mansion, shopping mall, power plant, oil rig, water mill, haunted
        house, space station, ruined abbey""",
    "landscape": """mountain, volcano, canyon, waterfall, crater, desert, glacier, island, cave, swamp, jungle,
        meadow, river, lake, beach, valley, cliff, coral reef, rice terrace, vineyard, tundra, oasis, fjord, geyser,
        salt flat, lagoon""",
    "city": """Paris, London, Tokyo, New York, Venice, Rome, Cairo, Istanbul, Moscow, Berlin, Amsterdam, Prague,
        Mumbai, Hong Kong, Rio de Janeiro, San Francisco, Las Vegas, Marrakesh, Havana, Reykjavik, Bangkok, Seoul,
        Lisbon, Vienna, Chicago, Sydney, Jerusalem, Athens, Kyoto, Edinburgh, Naples, Buenos Aires, Nairobi,
        Singapore, New Orleans""",
    "shop": """donut shop, coffee shop, barber shop, flower shop, bookstore, pet shop, bakery, butcher shop,
        supermarket, hardware store, record store, toy store, sushi bar, burger joint, pawn shop, farmers market, car
        dealership, antique store, candy store, pharmacy, laundromat, tattoo parlor, karaoke bar, casino""",
    "place": """in the woods, on a beach, in a city street, on a mountain top, in a kitchen, in a library, in the
        desert, in space, under water, in a meadow, in a garden, on a snowy hill, in a cave, in an old church, on the
        moon, in a swamp, in a living room, in a crowded market, at a bus stop, on a rooftop, in a parking lot, in a
        laboratory, on a stage, in a stadium, at a busy crossroads, on a railway platform, in a subway car, in a
        throne room, in a dungeon, in a wheat field, on a frozen lake, by a campfire, in a hospital corridor, in a
        classroom, in an office cubicle, on a pirate ship, on a desert island, in a bamboo forest, in a vineyard, at a
        gas station, in a bathtub, in a bowling alley, in an empty swimming pool, on a theater balcony, in a
        greenhouse, on a tennis court, in a boxing ring, at a carnival, in a circus tent, in a haunted mansion, in a
        graveyard, in a junkyard, on Mars, inside a volcano, in a rice field, at the edge of a cliff, on a suspension
        bridge, in a sewer, in an attic, in a castle courtyard, in a zen garden, in a museum hall, on a construction
        site, in a harbor, in a lighthouse, in a savanna, in a jungle, in a coral reef, in a thunderstorm, in a wine
        cellar, in a courtroom, in an elevator, in a phone booth, at a wedding, at a funeral, at a birthday party, at
        a press conference, at the Olympic games, in a saloon, in a shopping mall""",
    "time": """at sunset, at night, at dawn, in the rain, in the fog, in the snow, at noon, in autumn, in spring, in
        winter, under a full moon, under the northern lights, during a thunderstorm, in the golden hour, under a
        starry sky, during a solar eclipse, in a sandstorm, after the rain, on a hot summer day, by candlelight, in
        the 1920s, in the 1980s, in the middle ages, in ancient Rome, in the stone age, in the distant future, in the
        victorian era""",
    "color": """red, blue, green, yellow, black, white, pink, purple, orange, golden, silver, turquoise, crimson,
        ivory, teal, emerald, violet, brown, gray, magenta, lime green, navy blue, copper, beige, scarlet, pastel,
        rainbow-colored""",
    "look": """giant, tiny, old, beautiful, ancient, fluffy, rusty, glowing, broken, transparent, colorful,
        futuristic, retro, shimmering, ornate, minimalist, geometric, fractal, steampunk, cyberpunk, gothic, baroque,
        psychedelic, striped, spotted, hairy, bald, muscular, skinny, chubby, wrinkled, wet, dusty, muddy, frozen,
        burning, melting, floating, upside-down, miniature, enormous, slender, crooked, shiny, furry, feathered,
        scaly, bioluminescent, mechanical, wooden, knitted, origami, inflatable, pixelated, crystalline, moss-covered,
        tattooed, bejeweled, one-eyed, two-headed, winged, armored, hooded, masked, elegant, shabby, translucent,
        iridescent, holographic, dystopian, haunted, medieval, prehistoric, tropical, plush, embroidered, cracked,
        weathered, sparkling, droopy, spiky""",
    "mood": """happy, sad, angry, friendly, scary, cute, lonely, mysterious, sleepy, curious, brave, shy, proud, evil,
        loud, silly, clumsy, wise, grumpy, confused, majestic, mischievous, nervous, elegant, hungry, tired, calm,
        thundering, melancholic, ecstatic, bored, jealous, heroic, sinister, gentle, suspicious, dreamy, engaging,
        arrogant, polite, surprised, stoic, frantic, menacing, wistful, cheerful, stubborn, hypnotic, solemn,
        playful""",
    "adverb": "very, extremely, slightly, strangely, incredibly, rather, oddly, wonderfully, terribly, delightfully",
    "number": "two, three, four, five, six, seven, a dozen, a group of, a herd of, a row of, hundreds of, a pile of",
    "material": """wood, glass, gold, ice, marble, paper, chocolate, lego bricks, stone, clay, wool, rose ebony,
        copper, crystal, jade, bone, cardboard, sand, cheese, bamboo, amber, obsidian, silk, rubber, stained glass,
        moss, candy, porcelain, concrete, felt, leather, ivory, bronze, pearl, smoke, water, lava, balloons, flowers,
        old newspapers, circuit boards, spaghetti, seashells, feathers, neon tubes, mahogany, recycled plastic,
        driftwood""",
    "making": "made of, carved out of, built from, sculpted from, woven from, covered in, molded from, assembled from",
    "deed": """sleeping, dancing, running, reading @ book, playing chess, flying, swimming, smiling, crying, laughing,
        jumping, drinking tea, playing the piano, playing the violin, painting @ picture, taking @ selfie, riding @
        bicycle, surfing on @ wave, doing yoga, meditating, boxing, juggling, singing into @ microphone, fishing,
        waiting for @ bus, driving @ sports car, looking through @ telescope, looking into @ mirror, climbing @
        ladder, cooking dinner, baking bread, washing dishes, ironing @ shirt, knitting @ sweater, brushing its teeth,
        getting @ haircut, wearing @ crown, wearing @ top hat, wearing sunglasses, wearing @ tuxedo, wearing
        headphones, wearing @ space suit, playing basketball, playing tennis, lifting weights, skiing downhill,
        skateboarding, rowing @ boat, digging @ hole, planting flowers, watching television, typing on @ laptop,
        talking on the phone, giving @ speech, writing @ letter, praying, hugging @ pillow, blowing soap bubbles,
        flying @ kite, opening @ present, casting @ spell, escaping from prison, robbing @ bank, winning @ race,
        crossing @ river, hiding behind @ curtain, falling from the sky, riding @ dragon, fighting @ duel, floating in
        zero gravity, playing poker, voting, moonwalking, arguing about politics""",
    "hold": "holding, carrying, eating, guarding, stealing, chasing, admiring, balancing, painting, juggling, selling",
    "face": "chasing, fighting, hugging, riding on, dancing with, staring at, arguing with, playing chess with",
    "relation": """next to, beside, in front of, behind, on top of, near, under, facing, surrounded by, above, across
        from, leaning against, towering over, in the shadow of, reflected in, sitting on, standing on""",
    "medium": """photo, oil painting, watercolor painting, pencil drawing, digital painting, portrait, illustration,
        sketch, black and white photo, cartoon, 3d render, charcoal drawing, hyper realistic photo, portrait painting,
        concept art piece, ink drawing, pixel art picture, woodcut, mosaic, sculpture, stained glass window, comic
        book panel, polaroid photo, mural, movie poster, children's drawing, claymation still, fresco, tapestry,
        etching, engraving, pastel drawing, collage, low poly render, isometric render, macro photo, aerial photo,
        wide shot, close-up, vintage postcard, tarot card, embroidery, chalk drawing, linocut, album cover, blueprint,
        screenshot, cave painting, propaganda poster, magazine cover, botanical illustration, ukiyo-e print, anime
        still, graffiti mural, double exposure photo, marble statue""",
    "technique": """inks on parchment, oil on canvas, acrylic on wood, charcoal on paper, watercolor on silk, chalk on
        slate, gouache on cardboard, pencil on paper, spray paint on concrete, pastel on velvet""",
    "movement": """impressionism, hudson river school, cubism, art nouveau, surrealism, art deco, pop art, baroque,
        expressionism, studio ghibli, van gogh, picasso, monet, rembrandt, salvador dali, hieronymus bosch, hokusai,
        gustav klimt, edward hopper, vermeer, bauhaus, pointillism, futurism, renaissance, rococo, romanticism,
        minimalism, vaporwave, film noir, pre-raphaelite, dada, fauvism, constructivism, caravaggio, frida kahlo,
        basquiat, magritte, escher, norman rockwell, alphonse mucha, william turner, botticelli, banksy, andy warhol,
        wes anderson, tim burton, h. r. giger, pixar""",
    "finish": """highly detailed, digital art, trending on artstation, cinematic lighting, 4k, soft light, bokeh,
        dramatic lighting, sharp focus, vibrant colors, octane render, muted colors, studio lighting, volumetric
        light, symmetrical, neon lights, high contrast, minimalist background, depth of field, low angle view, fisheye
        lens, long exposure, 35 mm, white background, pastel colors, grainy film, unreal engine, intricate details,
        bird's-eye view, backlit""",
    "saying": """Hello, Welcome, Open, Closed, Happy Birthday, I love you, Help, No entry, Vote for me, Hot soup,
        Sorry, Danger, Free hugs, The end is near, Donuts for dinner, Good night, Wet paint, To the moon, Be kind,
        Where is my coffee?, Out of order, Beware of the dog, Never give up, Sold out, Time is money, Thank you, Bring
        back dinosaurs""",
    "sign": """@ sign that says, @ speech bubble that says, @ banner that reads, @ t-shirt with the text, graffiti
        that spells, @ billboard with the words, @ note that reads, @ neon sign saying""",
}

PATTERNS = {
    "trait": {
        "{look}": 8,
        "{mood}": 6,
        "{color}": 6,
        "{look} {color}": 1,
        "{adverb} {mood}": 2,
        "{mood} and {look}": 1,
    },
    "living": {"{animal}": 9, "{person}": 8, "{creature}": 4, "{dinosaur}": 1},
    "object": {"{thing}": 6, "{food}": 3, "{vehicle}": 3, "{plant}": 2},
    "one": {"{living}": 7, "{object}": 3},
    "being": {"@ {living}": 10, "@ {trait} {living}": 14, "{number} {living:s}": 2, "{number} {trait} {living:s}": 2},
    "item": {"@ {object}": 6, "@ {trait} {object}": 8, "{number} {object:s}": 2, "{look} {dish}": 1},
    "site": {"@ {trait} {building}": 3, "@ {trait} {landscape}": 3, "@ {building}": 1, "{landscape:s}": 1},
    "where": {
        "{place}": 14,
        "{time}": 4,
        "{place} {time}": 3,
        "in {city}": 2,
        "at @ {shop}": 1,
        "inside @ {building}": 1,
    },
    "act": {"{deed}": 8, "{hold} {item}": 7, "{face} {being}": 4, "looking at {item}": 1},
    "style": {
        "in the style of {movement}": 4,
        "{finish}": 4,
        "{finish}, {finish}": 2,
        "{medium}": 3,
        "{technique}": 1,
        "{medium}, {finish}": 2,
    },
    "polish": {"{finish}": 4, "{finish}, {finish}": 2, "in the style of {movement}": 2},
    "scene": {
        "{being} {act}": 5,
        "{being} {act} {where}": 7,
        "{being} {where}": 5,
        "{being} {relation} {item}": 4,
        "{being} {relation} {being}": 3,
        "{being} {act}, near an identical {one}": 1,
        "{being} {act}, {relation} {being}": 2,
        "{item} {where}": 5,
        "{item} {relation} {item}": 3,
        "{item} {relation} {site}": 1,
        "{item} {making} {material}": 3,
        "{being} {making} {material}": 2,
        "{dish} {making} {look} {material}": 1,
        "{site}": 2,
        "{site} {time}": 3,
        "{site} {making} {material}": 1,
        "{being} in front of {site}": 2,
        "{being} and {being} {where}": 2,
        "{being} {where}, with {sign} '{saying}'": 1,
        '{item} {where}, with {sign} "{saying}"': 1,
        '{being} {act}, {sign} "{saying}"': 0.5,
        "@ cross between @ {living} and @ {one}": 1,
        "@ {living} as @ {person}": 1,
        "the {living} of {city}": 0.5,
        "@ {trait} street in {city}": 1,
        "@ map of {city} {making} {material}": 0.3,
    },
    "prompt": {
        "{scene}": 9,
        "{scene}, {style}": 6,
        "@ {medium} of {scene}": 6,
        "{medium} of {scene}": 2,
        "@ {medium} of {scene}, {polish}": 2,
        "@ {trait} {living} {technique} with @ {trait} {one}": 0.5,
    },
}

UNCHANGED = """sheep deer moose bison reindeer squid fish goldfish pufferfish clownfish starfish jellyfish fruit
hovercraft samurai triceratops"""
PLURALS = {noun: noun for noun in UNCHANGED.split()} | {
    "woman": "women",
    "man": "men",
    "policeman": "policemen",
    "fisherman": "fishermen",
    "snowman": "snowmen",
    "mouse": "mice",
    "goose": "geese",
    "wolf": "wolves",
    "werewolf": "werewolves",
    "bookshelf": "bookshelves",
    "cactus": "cacti",
    "cyclops": "cyclopes",
    "oasis": "oases",
    "hero": "heroes",
    "tomato": "tomatoes",
    "volcano": "volcanoes",
    "wheel of cheese": "wheels of cheese",
    "pair of glasses": "pairs of glasses",
    "suit of armor": "suits of armor",
}
