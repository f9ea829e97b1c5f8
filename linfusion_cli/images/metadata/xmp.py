"""XMP (ISO 16684-1): the metadata that picture agencies, search engines and desktop tools read."""

import re
from xml.etree import ElementTree

from linfusion_cli.images.metadata.metadata import ImageInfo

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAMESPACES = {
    "x": "adobe:ns:meta/",
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "exif": "http://ns.adobe.com/exif/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
}
XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
# What XML 1.0 (section 2.2) cannot hold in any spelling; carriage returns would come back as line feeds.
ILLEGAL = re.compile("[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
HEAD = "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?>\n".encode()
TAIL = b"\n<?xpacket end='w'?>"

for _prefix, _uri in NAMESPACES.items():
    ElementTree.register_namespace(_prefix, _uri)


def xmp_packet(info: ImageInfo) -> bytes:
    """UTF-8 XMP: marked as made by a trained model (IPTC), the tool, the prompt and the A1111 parameters."""
    meta = ElementTree.Element(_name("x:xmpmeta"))
    rdf = ElementTree.SubElement(meta, _name("rdf:RDF"))
    about = ElementTree.SubElement(rdf, _name("rdf:Description"), {_name("rdf:about"): ""})
    ElementTree.SubElement(about, _name("xmp:CreatorTool")).text = _legal(info.software)
    ElementTree.SubElement(about, _name("Iptc4xmpExt:DigitalSourceType")).text = SOURCE_TYPE
    _language_alternative(about, "dc:description", info.prompt)
    _language_alternative(about, "exif:UserComment", info.parameters)
    return HEAD + ElementTree.tostring(meta, encoding="utf-8", xml_declaration=False) + TAIL


def xmp_user_comment(packet: bytes) -> str | None:
    """The A1111 parameters in a packet of ours; raises ElementTree.ParseError."""
    path = "/".join(["", "", _name("exif:UserComment"), _name("rdf:Alt"), _name("rdf:li")])
    return ElementTree.fromstring(packet.strip(b"\0 \n")).findtext(f".{path}")


def _language_alternative(parent: ElementTree.Element, name: str, text: str) -> None:
    if text:
        alternative = ElementTree.SubElement(ElementTree.SubElement(parent, _name(name)), _name("rdf:Alt"))
        ElementTree.SubElement(alternative, _name("rdf:li"), {XML_LANG: "x-default"}).text = _legal(text)


def _name(short: str) -> str:
    prefix, _, local = short.partition(":")
    return f"{{{NAMESPACES[prefix]}}}{local}"


def _legal(text: str) -> str:
    return ILLEGAL.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n").replace("\r", "\n"))
